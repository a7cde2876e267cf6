"""What stands on top of `reformer_lm.backbone`: output layers and their losses."""
