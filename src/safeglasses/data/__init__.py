"""The user's data: `safeglasses.data.examples` is the door, `safeglasses.data.miniature` a world to try."""
