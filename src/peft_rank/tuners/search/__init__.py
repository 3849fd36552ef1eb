# Copyright 2026 The peft_rank authors. Licensed under the Apache License, Version 2.0.
"""What the tuners that learn which singular values to keep have in common."""
