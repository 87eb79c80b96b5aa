"""Ask a model behind `mlflow models serve` for images, and write them side by side: python request.py [URL]"""

import json
import sys
import urllib.request

import numpy as np
from PIL import Image

LABELS = [3, 1, 4]
url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:5002/invocations"
body = {"inputs": LABELS, "params": {"seed": 7, "num_inference_steps": 25, "cfg_scale": 1.5}}
request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as answer:
    text = answer.read().decode()
images = np.array(json.loads(text)["predictions"], "uint8")  # [N, S, S, 3], one image for each label
Image.fromarray(np.hstack(list(images))).save("answer.png")
print("request ", json.dumps(body))
print("answer  ", text[:60], "...")
print("images  ", images.shape, images.dtype, "written side by side to answer.png")
