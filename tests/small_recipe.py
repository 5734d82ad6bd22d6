"""A recipe that the small model passes on any machine, and the shortest way to measure."""

from llmpack.target.protocol import Protocol

RECIPE = """\
schema = 1
name = "tiny"

[source]
model = "{model}"

[calibration]
text = ["python:pydoc_data.topics"]
tokens = 1024
length = 64

[[step]]
use = "quantize.gptq"
encoding = "iq4_nl"

[evaluation]
text = ["python:statistics"]
tokens = 256
length = 64

[runtime]
threads = 1

[budget]
memory = "600 MiB"
disk = "8 MB"
context = 128
quality = {{ kl = 9.0, top1 = 0.001 }}

[build]
threads = 1
"""


SHORT = Protocol(repetitions=2, least_seconds=0.0, rounds=1)
