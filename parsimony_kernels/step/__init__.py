"""An optimizer's step over one tensor, for dense, row-sparse and single entries: with a moment kept
in full, by covers, factored means or sketches.
"""
