"""The commands `onebase train`, `data`, `estimate` and `sweep`."""
