"""On-policy UltraFeedback: sample the model itself on UltraFeedback's prompts, rank, align to the best and the worst.

Command   fpo pipeline --config configs/pipelines/on_policy_ultrafeedback.py --workdir runs/on_policy
          --config.reward_model=<sequence classifier>
Stages    one sample of every unique prompt, sorted, with each of five seeds at temperature 0.8 and top-p 0.95; prompts
          whose five answers are all the same dropped; rewards; best against worst; alignment; answers to test prompts
Original  SimPO's recipe: vLLM, then ArmoRM-Llama3-8B (custom code, which is never run here: give a reward model with a
          plain head, such as one of this project); ties may make one answer both chosen and rejected, and no test split
          is made; here such groups are dropped and counted. Its answers have up to 4,096 tokens, here
          1,024 (sample.max_new_tokens, generate.max_new_tokens)
Expect    SimPO's sets made this way: AlpacaEval 2 LC 53.7 for Llama-3-8B-Instruct
"""

from fpo_jax.configs import llama3_instruct
from fpo_jax.configs.pipelines import common


def get_config(loss: str = "alphapo"):
    """Return the locked pipeline."""
    align = llama3_instruct.get_config(loss)
    c = common.pipeline(base="meta-llama/Meta-Llama-3-8B-Instruct", align=align, reward_model="")
    c.data.train = c.data.eval = "HuggingFaceH4/ultrafeedback_binarized"
    c.data.train_split, c.data.eval_split = "train_prefs", "test_prefs"
    c.pairing = "best_worst"
    drawn = {"top_p": 0.95, "max_new_tokens": 1024, "dedup": "all"}
    common.add(c, "sample", common.sampling(num_return=1, seeds=(13, 21, 42, 79, 100), **drawn))
    common.add(c, "generate", common.sampling(num_prompts=512, num_return=1, seeds=(42,), **drawn))
    return c
