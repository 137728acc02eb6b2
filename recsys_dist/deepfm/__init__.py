"""DeepFM on TorchRec tables. torch, and ray in train."""

import logging

# torchrec, when it is imported, makes torch.fx warn about torch's own code.
logging.getLogger("torch.fx").setLevel(logging.ERROR)
