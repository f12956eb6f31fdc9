"""Cases that the default suite leaves to ``make slow``: each takes long, and another case of the same claim stays."""

from __future__ import annotations

import pytest

SLOW = (
    "test_a_recipe_gives_the_scores_of_one_process_under_split_layers",
    "test_someones_own_model_gives_the_numbers_of_one_process[own-pp 2, zb-v]",
    "test_the_average_goes_on_from_a_checkpoint[fsdp 2-pp 2, 1f1b]",
    "test_deepspeed_is_imported_only_when_it_is_chosen",
    "test_frozen_weights_and_running_statistics_are_those_of_ddp[3-fp32]",
    "test_what_was_frozen_may_be_trained_from_a_checkpoint_on",
    "test_a_checkpoint_goes_on_under_another_layout",
    "test_a_layout_gives_the_numbers_of_one_process[pp 2, 1f1b stage]",
    "test_a_layout_gives_the_numbers_of_one_process[pp 2 x fsdp 2, zb-v stage]",
    "test_layouts_give_the_losses_and_running_statistics_of_one_process[pp 2 x fsdp 2, zb-v]",
    "test_layouts_give_the_losses_and_running_statistics_of_one_process[ddp 3]",
    "test_local_statistics_are_another_training",
    "test_a_layout_gives_the_very_bits_it_gives_without[selective-fsdp 2]",
    "test_compiled_training_agrees_with_eager",
    "test_fsdp_gives_the_losses_of_ddp_with_batch_norm[overrides1]",
    "test_fsdp_gives_the_losses_of_ddp_with_batch_norm[overrides2]",
    "test_fsdp_gives_the_losses_of_ddp_with_batch_norm[overrides3]",
    "test_the_command_lists_layouts_and_ends_with_json",
    "test_what_the_forward_has_no_use_for_stays_as_it_is_and_is_saved[pp 2, zb-v]",
    "test_layouts_stay_within_the_bound_of_verify[fsdp 2]",
    "test_a_checkpoint_of_any_layout_goes_on_under_any_other[vit > deepspeed zero-3 > fsdp 2]",
    "test_a_state_is_loaded_and_gone_on_from_to_the_bit[zero-3]",
    "test_its_checkpoints_go_on_under_the_plan",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/parallel/" in str(item.path) and item.name.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
