"""Point-in-time features: dataset folders, request records, transforms and batches."""
