r"""EleutherAI's lm-evaluation-harness with a model folder of ours.

    pip install lm_eval==0.4.12
    python examples/lm_eval_harness.py --model hf --model_args pretrained=model,dtype=float32 --tasks fluency \
        --include_path examples/lm_eval_tasks

Takes all options of `lm_eval`.
"""

from lm_eval.__main__ import cli_evaluate

import reformer_lm

# Importing the package makes transformers' Auto classes know its models, which is how the harness looks for them.
assert reformer_lm.ReformerLMForCausalLM

if __name__ == "__main__":
    cli_evaluate()
