"""Load an export in a fresh process and generate a sentence: `generate.py FOLDER`."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import actors.modeling_rankfront  # noqa: F401 (registers the model type)

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("The capital of France is", return_tensors="pt")
text = tokenizer.decode(model.generate(**prompt, max_new_tokens=16, do_sample=False)[0])
print(text)
assert len(text) > len("The capital of France is") + 10
