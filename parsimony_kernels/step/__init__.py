"""An optimizer's step over one tensor, from a dense gradient, or rows or elements of one. Moments
are kept in full, by covers, as factored means or in sketches.
"""
