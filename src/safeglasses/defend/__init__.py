"""From evidence to a defence: recipes make glasses; glasses are worn, folded into weights, saved, loaded."""
