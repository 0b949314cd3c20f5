"""LoRA fine-tuning for a laptop CPU or an old card.

Read examples/minimal.py first, then fine_tuning_practice.py, whose main() tells the story of a run in order.

Its wings (subpackages, and two single files), from low to high. A file imports only wings above its own line here, and
within a wing there are no cycles (tests/unit/test_wings.py):

    console     what a person reads and types: messages in two languages, user errors, settings -> flags, help
    compat      function parameters that differ between library versions (TRL, transformers, PEFT)
    storage     files written whole: JSON, manifest, signature, lock, disk space
    fast        hand-written forward and backward; kernels/ and decode/ inside; imports no other wing
    sources     where model and data come from: Hub, mirror, folder, embedded
    machine     what this machine is: facts, device and precision, memory, cards, doctor/
    data        file -> conversation -> labels -> batch
    model       base model, LoRA, adapter files
    run         one run's folder, record, model card, resume
    inference   load a result, chat with it, compare it
    training    trainer, recovery, memory fit, evaluation, plan
    export      merge, GGUF, Ollama, parity, hub/
    report      looks at data, at a folder, at a run
    cli         lora-practice COMMAND
"""

__version__ = "0.1.0"
