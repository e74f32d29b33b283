"""Losses of `spkd train --loss`. Each names the targets it needs and declares its settings; they add up."""
