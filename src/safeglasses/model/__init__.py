"""The only room that knows transformers' model internals: anatomy, sites, hooks, loading, encoding."""
