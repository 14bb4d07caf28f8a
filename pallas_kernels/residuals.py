"""Names of intermediate values that a rematerialised program does better to keep than to compute again."""

# A mask or list of selected keys; the output of attention; the log-sum-exp of it or of index scores, and other sums.
SELECTION, OUTPUT, LSE = "dsa_selection", "attention_output", "attention_lse"
