"""``python -m sap_lightning.models.pretrain_connector`` makes a LLaVA checkpoint of a CLIP and a language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from sap_lightning.console import on_terminal, quieten, run_as_command
from sap_lightning.data.anchors import captioned_images
from sap_lightning.data.instructions import IMAGE, PLAIN_TEMPLATE, Encoder, InstructionBatch, Sample, batch_of
from sap_lightning.data.preprocess import Preprocess
from sap_lightning.data.questions import DESCRIBE
from sap_lightning.errors import InputError, check_at_least, check_positive, short
from sap_lightning.files import new_folder, refuse_existing
from sap_lightning.models.clip import load_clip
from sap_lightning.models.language import load_language_model, tokenizer_of
from sap_lightning.models.llava import FrozenVision, embedded

LAYER = -2
"""Whose hidden states are taken, without the class token's, as in LLaVA 1.5."""
WARMUP = 0.03
LONGEST_TEXT = 256
"""Tokens beside the image's; a longer caption is cut off."""


class Whole(NamedTuple):
    """A LLaVA checkpoint in memory.

    Attributes:
        llava: the model.
        language: its language model under the names that it has alone, of the same weights.
        processor: of its texts and images.
        vision: what its tower makes of images.
        encoder: conversations to its tokens.
    """

    llava: LlavaForConditionalGeneration
    language: PreTrainedModel
    processor: LlavaProcessor
    vision: FrozenVision
    encoder: Encoder


class ConnectorPretraining(L.LightningModule):
    """Trains the connector alone, on captions: the first stage of LLaVA (Liu et al. 2023, https://arxiv.org/abs/2304.08485).

    Its settings are LLaVA 1.5's (AdamW, cosine, no decay; Liu et al. 2024, https://arxiv.org/abs/2310.03744), but for
    the batch size, and that an image is asked about in the language model's own chat template; LLaVA puts the image
    before the caption and nothing else.

    Args:
        whole: the checkpoint.
        samples: an image and its caption each.
        batch_size: of them.
        learning_rate: peak learning rate.
        seed: of the order of samples.
    """

    def __init__(
        self, whole: Whole, samples: Sequence[Sample], batch_size: int, learning_rate: float, seed: int
    ) -> None:
        super().__init__()
        self.whole = whole
        self.samples = samples
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.seed = seed
        self.language = whole.language
        self.connector = whole.llava.model.multi_modal_projector

    def train_dataloader(self) -> DataLoader[InstructionBatch]:
        """The captions in another order in every epoch."""
        return DataLoader(
            list(self.samples),  # type: ignore[arg-type]
            self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=lambda some: batch_of(some, self.whole.encoder),
        )

    def losses(self, batch: InstructionBatch, images: Sequence[Path]) -> Tensor:
        """−log p of every token of the captions, given images."""
        encoder = self.whole.encoder
        of_images = self.connector(self.whole.vision(images, self.device))
        inputs = embedded(self.language, batch.ids, cast(int, encoder.image_token), of_images)
        hidden = self.language.base_model(inputs_embeds=inputs, attention_mask=batch.attention).last_hidden_state
        labels = batch.labels[:, 1:]
        learned = labels >= 0
        logits = cast(nn.Module, self.language.get_output_embeddings())(hidden[:, :-1][learned])
        return nn.functional.cross_entropy(logits.float(), labels[learned], reduction="none")

    def training_step(self, batch: InstructionBatch, batch_idx: int) -> Tensor:
        """The mean over the tokens of a batch."""
        loss = self.losses(batch, batch.images).mean()
        self.log("loss", loss.detach(), prog_bar=True, on_step=False, on_epoch=True, batch_size=len(batch.ids))
        return loss

    def on_train_epoch_end(self) -> None:
        loss = float(self.trainer.callback_metrics["loss"])
        print(f"epoch {self.current_epoch + 1}/{self.trainer.max_epochs}: loss of captions {loss:.3f}", flush=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW of the connector's weights."""
        optimizer = torch.optim.AdamW(self.connector.parameters(), self.learning_rate, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        rates = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def pretrain_connector(
    vision: str,
    language: str,
    captions: str | Path,
    output: str | Path,
    epochs: int = 1,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Write a LLaVA checkpoint of frozen towers and a connector that is trained on captions.

    ``from_pretrained`` and ``AutoProcessor`` load it. The connector is LLaVA 1.5's, Linear–GELU–Linear.

    Args:
        vision: hub id or folder of a CLIP checkpoint, of which the vision tower is taken.
        language: hub id or folder of a causal language model. Its tokenizer gets the token <image>, where it has none,
            whose embedding is the mean of the others, and LLaVA 1.5's chat template, where it has none.
        captions: a JSONL file beside its images: ``file_name``, and ``captions``, each of which is learned.
        output: folder to write; must not exist yet.
        epochs: how often each caption is seen.
        batch_size: captions a step.
        learning_rate: peak learning rate.
        seed: of the connector's initial values and of the order of captions.

    Raises:
        InputError: the folder exists, a number is out of range, a checkpoint cannot be loaded, or a line is faulty.
    """
    refuse_existing(output)
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_at_least(name, value, least)
    check_positive("learning_rate", learning_rate)
    samples = caption_samples(Path(captions))
    whole = assemble(vision, language, seed)
    train(whole, samples, epochs, batch_size, learning_rate, seed)
    write(whole, output)


def caption_samples(captions: Path) -> list[Sample]:
    """A question and an answer for each caption of a JSONL file.

    Raises:
        InputError: a line is faulty.
    """
    captioned = [(image, caption) for image, said in captioned_images(captions) for caption in said]
    if spoken := next((caption for _, caption in captioned if IMAGE in caption), None):
        raise InputError(f"{captions}: the caption {short(spoken)} holds {IMAGE}, which stands for an image; reword it")
    return [Sample("caption", ((DESCRIBE, caption),), image, str(captions)) for image, caption in captioned]


def train(
    whole: Whole, samples: Sequence[Sample], epochs: int, batch_size: int, learning_rate: float, seed: int
) -> None:
    """Trains the connector of a checkpoint in place."""
    trainer = L.Trainer(
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=on_terminal(),
    )
    trainer.fit(ConnectorPretraining(whole, samples, batch_size, learning_rate, seed))


def write(whole: Whole, folder: str | Path) -> None:
    """Writes a checkpoint that transformers loads."""
    with new_folder(folder) as draft:
        whole.llava.save_pretrained(draft)
        whole.processor.save_pretrained(draft)


def assemble(vision: str, language: str, seed: int) -> Whole:
    """A LLaVA checkpoint in float32, its towers frozen and its connector drawn at random.

    Raises:
        InputError: a checkpoint cannot be loaded.
    """
    tower = load_clip(vision, "--vision").vision_model
    model = load_language_model(Path(language)).requires_grad_(False)
    tokenizer = tokenizer_of(Path(language), "--captions")
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    image_token = with_image_token(model, tokenizer)
    seen = FrozenVision(tower, Preprocess(vision), LAYER, keeps_class=False)
    for part in (tower.config, model.config):
        part._name_or_path = ""  # where they were read is nobody's business
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=model.config,
        image_token_index=image_token,
        image_seq_length=seen.features,
        vision_feature_layer=LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=model.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower, llava.model.language_model = tower, model.base_model
    llava.lm_head = cast(nn.Linear, model.get_output_embeddings())
    llava.generation_config = cast(Any, model.generation_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llava.model.multi_modal_projector = LlavaMultiModalProjector(config)
    processor = LlavaProcessor(
        AutoImageProcessor.from_pretrained(vision, backend="pil", trust_remote_code=False),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,  # the class token, which "default" drops
    )
    encoder = Encoder(tokenizer, image_token, seen.features, seen.features + LONGEST_TEXT)
    return Whole(llava.eval(), model, processor, seen, encoder)


@torch.no_grad()
def with_image_token(model: PreTrainedModel, tokenizer: Any) -> int:
    """The id of <image>, for which a language model and its tokenizer get a row where they have none."""
    if IMAGE in tokenizer.get_vocab():
        return int(tokenizer.convert_tokens_to_ids(IMAGE))
    known = len(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if len(tokenizer) > cast(nn.Embedding, model.get_input_embeddings()).num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = cast(nn.Embedding, table).weight
        weight[known] = weight[:known].mean(dim=0)
    model.requires_grad_(False)
    return known


if __name__ == "__main__":
    quieten()
    run_as_command(pretrain_connector, as_positional=False)
