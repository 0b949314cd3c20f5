"""`lora-practice doctor`: the machine page, with what is here, what will be used, what is wrong and how to fix it."""
