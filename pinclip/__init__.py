"""pinclip: multimodal item embeddings trained on a catalogue's own graph.

pinclip.ops         fused ops, usable alone          pinclip.models     towers, fusion, PinCLIP
pinclip.losses      image-text and neighbor losses   pinclip.graph      the Pin-Board graph
pinclip.data        pin stores, batches              pinclip.train      DeepSpeed training
pinclip.retrieval   exact evaluation, reports        pinclip.reference  plain torch, the truth
"""
