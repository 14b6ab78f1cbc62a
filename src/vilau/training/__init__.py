"""Training on one engine: stages `align`, `vision_tower`, `pretrain`, `sft`, on one process or many."""
