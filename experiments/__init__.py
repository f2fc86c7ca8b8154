"""Named datasets, floors, benchmarks and figures. Nothing imports this package."""
