"""What the commands ``tune`` and ``bench`` measure, how they time it, and what they write."""
