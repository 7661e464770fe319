"""Tables of texts and labels: one's own data as other programs write it, read row by row.

CSV, TSV, JSON lines, JSON lists, Parquet, fastText and Annif corpora end in the same `Raw` as the
sets of the field do in `layouts`.
"""
