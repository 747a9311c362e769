"""Every plot of a report, in the order of its page."""

from __future__ import annotations

from launch.report.plots import cache, heldout, load, training
from launch.report.plots.canvas import Plot
from launch.report.plots.tasks import Against

GUESS = (
    "Averaged over the other lengths and depths. Hollow: the null, whose answers cannot be known. Dashed: a guess. "
    "niah: needles in a haystack."
)

# fmt: off
PLOTS = (
    Plot("loss.png", "Loss over training", "Lines: training, smoothed. Dots: held-out. Thin lines: the tokens "
         "further ahead, of multi-token prediction (mtp 1 is one further than the next). Bands: from the least to the "
         "most of the seeds. Dashed: unigram entropy, the held-out loss of knowing only how frequent each token "
         "is.", "a step", training.loss_over_tokens),
    Plot("loss_time.png", "Loss over time", "The same against the time of all steps and saves; start-up and "
         "validation are not in it.", "a step, and all runs one kind of machine, ranks and threads",
         training.loss_over_time),
    Plot("quality.png", "Held-out quality against cache", "What a scheme's cache costs, and what quality it buys.",
         "a validation", cache.quality_against_cache),
    Plot("sources.png", "Held-out loss by source", "Each text has its own scale, because the losses of different "
         "texts do not compare.", "a validation on two corpora or more", heldout.by_source),
    Plot("position.png", "Held-out loss by position", "The further to the right, the more context a token had; at the "
         "last validation.", "a validation by position", heldout.by_position),
    Plot("by_length.png", "Accuracy by length", GUESS, "a validation on a task at two lengths or more",
         Against(("length",), "length (tokens of the window)", doubling=True)),
    Plot("by_depth.png", "Accuracy by depth", GUESS, "a validation on a task at two depths or more",
         Against(("depth",), "depth (0: at the beginning)", doubling=False)),
    Plot("by_pairs.png", "Accuracy by number of pairs", GUESS, "a validation on a task with two numbers of pairs or "
         "keys, or more", Against(("pairs", "keys"), "pairs or keys in the window", doubling=True)),
    Plot("by_hops.png", "Accuracy by hops", GUESS, "a validation on a task with two numbers of hops or more",
         Against(("hops",), "hops to the value", doubling=False)),
    Plot("load.png", "Expert load", "The busiest expert's load ÷ the mean, over all layers, smoothed.",
         "a step of a model with experts", load.mean_over_layers),
    Plot("load_layers.png", "Expert load by layer", "The same layer by layer, as colour; mtp 1 is the layer that "
         "predicts one further token.",
         "a step of a model with experts", load.by_layer),
    Plot("speed.png", "Throughput", "Median over the steps; the thin line spans the middle half of them.", "a step",
         training.speed),
)
# fmt: on
