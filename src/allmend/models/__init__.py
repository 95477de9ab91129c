"""Models and what learns in them: where they come from, how they load, which of their tensors travel.

`sources` finds or makes a model folder, `load` loads it, `adapters` decides what learns, `tensors` is the form in
which tensors are stored and sent.
"""
