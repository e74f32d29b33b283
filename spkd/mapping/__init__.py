"""Maps between the embedding spaces of two models: a new model without enrolling anew."""
