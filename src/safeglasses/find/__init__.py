"""From labelled examples to evidence per neuron, and from evidence to sets of neurons."""
