"""Training: `Trainer` and everything that belongs to one run.

trainer           the run: its inputs, mesh and steps, and the loop
callbacks         what happens beside the steps: logging, profiling, evaluation, checkpoints, preemption
train_step        the train, evaluation and reference step of one batch: pure functions
steps             these, jitted for a run: with forward (log-probs or scores of a batch), compiled_step, kept_logits
train_state, device_batch  where the state and the batches live on the mesh
adapters          the adapter of a run
run_inputs, dataset_cache  what a run reads; tokenised data kept between starts
start_checks      places to write to and W&B's account, before anything expensive
run_schedule, batch_shapes, run_workdir  its order and sizes, what makes it the same run
auto_settings     layout of rows, remat and micro-batch, where they are left to the run
reference_logprobs  log-probs under the reference: computed once, kept on disk
evaluator, sample_completions, best_checkpoint, reward_labels  evaluations
metrics, metric_logger, run_summary  what is observed, where it is written, what a run says first
export, model_card  a checkpoint as a Hugging Face directory, and its card
"""
