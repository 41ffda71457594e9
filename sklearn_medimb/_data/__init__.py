"""From the X of the caller to batches on the device."""
