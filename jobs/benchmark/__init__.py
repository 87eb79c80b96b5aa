"""benchmark: how fast the data plane is, each figure beside a plain baseline measured in the same run.

edt bench data [--images FOLDER]     latents read, planning, preprocess, memory
edt bench encode                     the encoder beside its autoencoder alone
"""
