"""benchmark: speed of data, training and evaluation, each figure beside a plain baseline measured in the same run.

edt bench data [--images FOLDER]     latents read, planning, preprocess, memory
edt bench scale                      plans and streams of up to 100 million images on up to 1,024 workers
edt bench encode                     the encoder beside its autoencoder alone
edt bench train [--model EDT-S/2]    step, loop, workers and checkpoints beside the bare step and a plain one
edt bench eval [--model EDT-S/2]     sampling, whole evaluations and metrics beside bare calls, plain ones and scipy
"""
