"""TRL's side of `benchmarks/train_step.py`: its DPOTrainer as its own users would have it.

On a GPU it has bfloat16 autocast over float32 weights, or weights in bfloat16 as the alignment handbook loads them,
which halves the memory: AdamW's moments are bfloat16 too then, and an update below half a bfloat16 step of a weight is
lost. PyTorch's scaled dot-product attention, the fused AdamW, TF32 for what is float32, no log lines. TRL 1.16 has no
padding_free for DPO (it warns and pads) and a fused head of its own; with Liger, Liger's kernels of the layers (norms,
rotary, SwiGLU) replace those of transformers, and its loss is not used (TRL refuses its fused heads).
"""

import statistics
import time
from pathlib import Path

from benchmarks.train_step_turns import BETA, Case, Turns


def trl(case: Case, model: Path, *, weights: str = "float32", liger: bool = False) -> None:
    """TRL's DPOTrainer on pairs that are tokens already, reference log-probs computed beforehand."""
    import datasets
    import torch
    import transformers
    from trl import DPOTrainer

    turns = Turns(case)
    prompts, chosen, rejected = case.pairs()
    micro = case.trl_micro or prompts.shape[1]
    passes = prompts.shape[1] // micro  # of an update
    table = datasets.Dataset.from_dict(
        {
            "prompt_ids": prompts.reshape(-1, case.prompt).tolist(),
            "chosen_ids": chosen.reshape(-1, case.completion).tolist(),
            "rejected_ids": rejected.reshape(-1, case.completion).tolist(),
        }
    )
    pending: list[torch.Tensor] = []
    scored: list[float] = []  # when a batch of the reference pass ended

    def wait() -> None:
        if case.device == "gpu":
            torch.cuda.synchronize()

    def finish() -> None:
        wait()
        values = [float(loss) for loss in pending]
        turns.losses([statistics.fmean(values[at : at + passes]) for at in range(0, len(values), passes)])
        pending.clear()

    def device() -> dict:
        if case.device != "gpu":
            return {"device": "cpu", "peak_bytes": 0}
        return {"device": torch.cuda.get_device_name(0), "peak_bytes": torch.cuda.max_memory_allocated()}

    class Gate(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            turns.before(state.global_step, finish)

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _precompute_ref_logps(self, *arguments):
            started = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments)
            seconds = (time.perf_counter() - started) / len(prompts)
            if case.on_gpu:  # without what a GPU does once, and the cache
                seconds = (scored[-1] - scored[0]) / (len(scored) - 1) * passes
            turns.reference(seconds)
            return found

        def compute_ref_log_probs(self, *arguments):
            found = super().compute_ref_log_probs(*arguments)
            wait()
            scored.append(time.perf_counter())
            return found

        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments, **named):
            found = super().compute_loss(*arguments, **named)
            pending.append((found[0] if isinstance(found, tuple) else found).detach())
            return found

    if case.on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32
    trainer = Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, weights), attn_implementation="sdpa"
        ),
        args=arguments(case, model, micro=micro, passes=passes, steps=len(prompts), liger=liger),
        train_dataset=table,
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
        callbacks=[Gate()],
    )
    trainer.train()
    turns.done(finish, device if case.on_gpu else None)


def arguments(case: Case, model: Path, *, micro: int, passes: int, steps: int, liger: bool):
    """Return the DPOConfig of a case."""
    from trl import DPOConfig

    checkpointed = case.trl_remat != "none"
    options: dict = {"bf16": False, "use_cpu": True, "logging_steps": 1}
    if case.on_gpu:
        options = {
            "bf16": case.dtype == "bfloat16",
            "use_cpu": case.device == "tiny",
            "optim": "adamw_torch_fused",
            "logging_strategy": "no",
            "logging_nan_inf_filter": False,
            "dataloader_num_workers": 0,
            "use_liger_kernel": liger,
        }
    if checkpointed:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return DPOConfig(
        output_dir=str(model.parent / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        max_steps=steps,
        learning_rate=case.rate,
        beta=BETA,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        max_length=None,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=micro,
        gradient_checkpointing=checkpointed,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
