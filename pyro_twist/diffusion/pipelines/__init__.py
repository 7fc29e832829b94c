# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

r"""
Pipelines of diffusers as Pyro models.

:meth:`GaussianDiffusion.from_pipeline() <pyro_twist.diffusion.GaussianDiffusion.from_pipeline>`
takes a pipeline apart: the prompts are encoded by its ``encode_prompt``, the latents have the shape
and scale that its ``prepare_latents`` gives them, the network is its ``unet`` or ``transformer``,
and its ``vae`` and ``image_processor`` make the images. The loop over the steps is that of
:class:`~pyro_twist.diffusion.GaussianDiffusion`, and the pipeline itself is not changed.

=============================================  ====================================================
pipelines                                      options beside those of ``from_pipeline``
=============================================  ====================================================
``StableDiffusion`` 1.x and 2.x, also          ``clip_skip``, ``cross_attention_kwargs``,
``Img2Img`` and ``Inpaint``                    ``mask_image``, ``masked_image_latents``
``StableDiffusionXL``, also ``Img2Img`` and    these, ``prompt_2``, ``negative_prompt_2``,
``Inpaint``                                    ``original_size``, ``crops_coords_top_left``,
                                               ``target_size``, each also with ``negative_``
``StableDiffusion3``, also ``Img2Img``         ``prompt_2``, ``prompt_3``, each also with
                                               ``negative_``, ``clip_skip``, ``mu``,
                                               ``max_sequence_length``, ``joint_attention_kwargs``
``Flux``, also ``Img2Img``                     ``prompt_2``, ``negative_prompt_2``,
                                               ``true_cfg_scale``, ``max_sequence_length``,
                                               ``joint_attention_kwargs``
``PixArtSigma``                                ``clean_caption``, ``max_sequence_length``,
                                               ``use_resolution_binning``
``DiT``                                        the prompts are class labels
``DDPM``, ``DDIM``                             no prompts, pixels instead of latents
=============================================  ====================================================

Another kind is added by :func:`register_pipeline`.
"""

from pyro_twist.diffusion.pipelines.adapter import Conditioning, LatentAdapter, PipelineAdapter
from pyro_twist.diffusion.pipelines.build import register_pipeline

__all__ = ["Conditioning", "LatentAdapter", "PipelineAdapter", "register_pipeline"]
