"""The formats of human preferences in the ecosystem: rankings, pairs and labelled replies."""
