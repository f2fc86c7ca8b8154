"""The click-through-rate ranker: fused embedding tables, two towers, training."""
