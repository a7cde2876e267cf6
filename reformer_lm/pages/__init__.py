"""Results as one HTML page that needs neither scripts nor a network. It knows nothing of models."""
