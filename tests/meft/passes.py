"""Ways of running a model that more than one file tests: kinds of generation, and checkpointed training."""

GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beam": {"num_beams": 3},
    "beam with several": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
}


def checkpointed(tiny, reentrant, **fields):
    model = tiny.adapted(3, **fields)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()
