"""Names of intermediate values that a rematerialised program does better to keep than to compute again."""

# A mask or list of selected keys; the output and the log-sum-exp of attention.
SELECTION, OUTPUT, LSE = "dsa_selection", "attention_output", "attention_lse"
