"""`transformers serve` for a model folder of ours: an HTTP server with OpenAI's /v1/completions.

    pip install "transformers[serving]"
    python examples/serve.py model/ --port 8000

Takes all options of `transformers serve`.
"""

import sys

import transformers
from transformers.cli.transformers import main

import reformer_lm

# It looks architectures up in transformers itself, where a library's registered models are not found.
transformers.ReformerLMForCausalLM = reformer_lm.ReformerLMForCausalLM

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()
