"""DeepFM on TorchRec tables. torch, and ray in train."""
