"""Whether onnxruntime-genai generates from an export what transformers generates from its model.

    PYTHONPATH=GENAI python genai.py EXPORT --against MODEL [--tokens 32] [--prompt TEXT ...]

EXPORT is a folder with genai_config.json, prefill.onnx and decode.onnx, MODEL the checkpoint that
it was made of. GENAI is a folder into which a wheel of onnxruntime-genai was unpacked: it requires
a package that must not be installed beside onnxruntime-gpu. Prints for each prompt whether the
greedy tokens are equal, and both texts.
"""

from __future__ import annotations

import argparse

import numpy as np
import onnxruntime_genai as genai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once")


def main() -> None:
    arguments = parse_arguments()
    exported = genai.Model(arguments.export)
    tokenizer = AutoTokenizer.from_pretrained(arguments.against)
    model = AutoModelForCausalLM.from_pretrained(arguments.against, dtype=torch.float32).eval()
    for prompt in arguments.prompt or PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        found = generate(exported, tokens["input_ids"][0].tolist(), arguments.tokens)
        with torch.inference_mode():
            row = model.generate(**tokens, max_new_tokens=arguments.tokens, do_sample=False)[0]
        expected = row[len(tokens["input_ids"][0]) :].tolist()
        # genai leaves the end token out
        equal = found == expected or found == expected[:-1]
        print(f"{prompt!r}: {'equal' if equal else 'DIFFERENT'}")
        print(f"  genai        {tokenizer.decode(found)!r}")
        print(f"  transformers {tokenizer.decode(expected)!r}")


def generate(model: genai.Model, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens after a prompt."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens: list[int] = generator.get_sequence(0).tolist()
    return tokens[len(prompt) :]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export")
    parser.add_argument("--against", required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", action="append")
    return parser.parse_args()


if __name__ == "__main__":
    main()
