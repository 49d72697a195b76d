"""The only room that knows transformers' model internals: anatomy, sites, hooks, loading, encoding."""

from safeglasses.model.installed import check_torchvision

check_torchvision()  # before the first import of transformers, which would fail without saying why
