# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What the examples share: the compared methods, metrics that work offline, local files, runs over seeds."""
