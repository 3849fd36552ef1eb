# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""Who keeps which rank: pure functions of tensors that know nothing of models, trainers or files."""
