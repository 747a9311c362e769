"""Engines: `engine: x` means `train/engines/x.py`. All have one protocol: build, initialise, step, evaluate,
save, load.

Engine(config, ranks)                      builds the parallel model and its optimizer
initialise(among)                          draws the weights that nothing will be loaded over, and starts all buffers
step(batch, learning_rate, clock, watch) -> Step  one optimizer step; the clock is told where the time went
before_update                              a function, called in each step before anything of the state changes
watch() -> Watch                           for the statistics of a step
evaluate(batches) -> Evaluation            no gradients
state() -> dict, load(state)               everything that resuming needs besides the step number
"""
