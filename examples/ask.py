"""Ask the bundled model about an image, in four ways. Run: python examples/ask.py

Research use only, not for clinical decisions.
"""

from pathlib import Path

import vitalrt

IMAGE = Path(__file__).parent / "demo.png"
QUESTION = "Where is the cyst?"

model = vitalrt.load()

# One answer, after four latent steps. The latents come with it.
answer = model.generate(IMAGE, QUESTION, k=4)
print(answer, tuple(answer.latents.shape), f"{answer.timings.total:.1f} ms")

# A batch: every request with its own K.
requests = [vitalrt.Request(IMAGE, QUESTION, k=k) for k in (0, 1, 2, 4)]
for request, answer in zip(requests, model.generate_batch(requests), strict=True):
    print(f"k={request.k}: {answer}")

# Piece by piece.
for piece in model.stream(IMAGE, "Describe the cyst."):
    print(piece, end="", flush=True)
print()

# What the model takes, prepared once and run as often as needed.
prompt = model.prepare(IMAGE, QUESTION)
print([str(answer) for answer in model.run([prompt, prompt], k=[0, 8])])
