"""What docs/results says beside figures: every chapter's heading, finding and text. `results.py` puts them together.

A finding is one sentence with figures of the chapter's own file in braces, so that it is renewed with them:

    {NAME}             the value of criterion NAME
    {least PATTERN}    of all criteria whose names fit the pattern; `most` likewise
    {most TABLE/COLUMN}  of a column of a table
    {…:FORMAT}         as Python formats it (three digits where nothing is said), or MB, of bytes
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chapter:
    """Heading, finding (one sentence), and what a reader needs to know beside the tables (Markdown, may be empty)."""

    heading: str
    finding: str
    text: str = ""


CHAPTERS = {
    "bound": Chapter(
        "The fixed-rate menu against the Gaussian bound",
        "Grids need {least menu/gap bits:.2f} to {most menu/gap bits:.2f} bits more than the bound, growing with the "
        "rate; their t² is at most {most excess_over_published_t2_*:.1%} above the published.",
        "![t² against rate](../images/rate-distortion.png)\n\nt² is measured on an independent sample (p = 1: exact).",
    ),
    "prediction": Chapter(
        "Prediction against measurement",
        "At 2 to 6 bits the prediction is within {worst_deviation_text:.0%} of the measured KL with a "
        "probe of text, and within {worst_deviation_self:.0%} without data.",
        "Bits are those of the indices; stored bits count scales and padding. Above 0.1 nats per token what "
        "sensitivities add up to is too low: plans that were tried are corrected, others give no interval.",
    ),
    "gains": Chapter(
        "The three gains",
        "The gain chosen from α and β loses at most {most chosen_over_better_*:.1%} more than the better of the MSE "
        "and the unbiased one, on two families.",
        "For the same codecs: the chosen gain, the MSE scale, the unbiased scale. The GPT-2 is trained by the script "
        "for minutes. Its allotted plans lose more than predicted, and at 3.25 bits the MSE scale's own plan, which "
        "allots other bits, loses less than the chosen gain's.",
    ),
    "sensitivity": Chapter(
        "The two estimators",
        "The fast estimator agrees with perturbing one matrix at a time (median ratio {median_ratio_alpha:.2f}), "
        "{perturb_time_over_fisher_time:.0f} times as fast.",
    ),
    "quality": Chapter(
        "Against other methods at equal bytes",
        "At equal stored bits, allotted plans have {least allotted_kl_over_[!u]*:.2f} to "
        "{most allotted_kl_over_[!u]*:.2f} of the KL of INT3, INT4, NF4 and HQQ.",
        "`uniform` is one grid for all matrices that takes no more bits than the method it stands beside, `allotted` "
        "the plan within the same bits.",
    ),
    "conventions": Chapter(
        "Figures that people know",
        "None of {figures_compared} figures is further than {largest_difference_in_last_digits:.2f} of the last "
        "printed digit from llama-perplexity's; the relative difference of word "
        "perplexities from lm-eval's is {word_perplexity_against_lm_eval_relative:.2g}.",
        "What llama-perplexity prints against what waterfill computes on the same weights and windows, in units of the "
        "last digit printed; and lm-eval's figures for documents against those of `waterfill eval --tasks`.",
    ),
    "compare": Chapter(
        "Every method at true bytes, and the theorem under test",
        "Within the same bytes on disk our plans have {least our_kl_over_*:.2f} to {most our_kl_over_*:.2f} of the KL "
        "of methods without data; KL is predicted within 10 % from {within_10_percent_from_bits:.3f} to "
        "{within_10_percent_to_bits:.3f} bits.",
        "![KL against bytes](../images/compare.png)\n\nBeside every method stands our plan within the method's bytes, "
        "planned without data. Methods called calibrated have seen text of the kind that is measured on. In the second "
        "figure every point is one packed model.\n\n![Predicted and measured KL](../images/theorem.png)",
    ),
    "streaming": Chapter(
        "Models that do not fit in memory",
        "Within a third of the artifact, a token takes {least time_over_slowest_stage_*:.2f} to "
        "{most time_over_slowest_stage_*:.2f} of its slowest stage's time, and the engine is "
        "{least times_as_fast_as_llama_*:.1f} to {most times_as_fast_as_llama_*:.1f} times as fast as llama.cpp.",
        "Random weights in the shapes named, at 3 bits, streamed by the engine within a third of the artifact: `group` "
        "is what the control group counts, page cache included. `over the slowest` is the time of a token over the "
        "longest of reading, decoding and computing, each alone; decoding and computing share the cores, so where "
        "storage is fast it is their sum that counts. llama.cpp maps its file; what the limit leaves is page cache. "
        "accelerate and AirLLM do not end below the limit that they were given; we are then measured once more under "
        "the same one, in which all weights stay in memory. The device's own speed drifts: there we are measured once "
        "more right after each peer, and `times as fast` is of those two. Rows of one model and storage are of one "
        "run; beside fixed rates and peers, those of storage that is slowed down were measured some commits before "
        "the others, and are medians of passes where the others are means. The text is what speculation continues.",
    ),
    "memory": Chapter(
        "Memory beside its limit",
        "Of everything that takes `--memory`, {limits_exceeded} runs exceeded it.",
        "Every row is a process of its own, and its peak the kernel's own count (VmHWM). Where a limit is refused, the "
        "answer is the memory that the refusal asks for.",
    ),
    "allocation": Chapter(
        "Allocation",
        "The relative excess over an integer-programming solver's optimum is {relative_excess_over_milp:.2g}; 25,000 "
        "tensors take {time_s_25000_tensors:.1f} s.",
        "The sensitivities of Llama-3.1-8B are published ones: 224 matrices in `llama-3.1-8b-alphas.json`, from the "
        "public experiment repository of the first author of HIGGS (25,853 bytes, SHA-256 "
        "`bcf667decd0881a9768df0c8fbf6787c4a5ebbffa48c5484288cc7fed4489c78`).",
    ),
    "calibrated": Chapter(
        "Error feedback at equal bytes",
        "Calibrated on its own text, without data, a model loses {least *_by_own_on_*:.2f} to {most *_by_own_on_*:.2f} "
        "times what it loses at the same bytes without feedback.",
        "SmolLM2-135M-Instruct, as it comes out of a 4-bit GGUF file, so that it loses more than others at these "
        "rates. Its embedding, a fifth of the weights, is the head too: `kept` leaves it out of the budget, which bits "
        "then count without it. Columns named after texts are KL, measured on the half that calibrates nothing; "
        "`own` is text that the model wrote, from random tokens on. Of no feedback: the share of the KL of the same "
        "bytes without it. Seconds are of planning and packing with AVX-512, where the first row measured what the "
        "next ones used again; other work ran beside them.",
    ),
    "scale": Chapter(
        "What planning costs",
        "A plan of 135 million weights, of which the loss is known to ±{smollm2-135m_known_to:.0%} without data, takes "
        "{smollm2-135m_s:.0f} s and {smollm2-135m_peak_bytes:MB} from scratch; one of 405 billion weights by their "
        "shapes {most_plan_s_llama-3.1-405b:.1f} s, of a trillion {most_plan_s_1t_mixture_of_experts:.0f} s.",
        "SmolLM2-135M-Instruct, and Qwen2.5-Coder-Instruct of 0.5 and 1.5 billion weights, as they come out of GGUF "
        "files; plans without error feedback. The machine has AVX-512 and was held to AVX2 by `WATERFILL_ISA`, "
        "`ATEN_CPU_CAPABILITY`, `ONEDNN_MAX_CPU_ISA` and `MKL_ENABLE_INSTRUCTIONS`. How many sequences it takes hangs "
        "on what a model happens to write: passes are over the first number of sequences, trials of the plan, with its "
        "noise in all matrices, over the second one. Sums are what sensitivities of many sequences add up to, without "
        "a trial. Own text that promises are measured on is none that was planned with. One in 24 of the smaller coder "
        "model's loses a hundred times what others do; a promise counts none as more than four times the median. The "
        "checkpoint that is larger than memory was measured in bfloat16, with AVX-512. What "
        "tokens lose by their places, and plans by shapes, were measured on an Intel Xeon that was held to AVX2, too, "
        "some commits earlier, when texts still began with the token that sampling does.",
    ),
    "batching": Chapter(
        "Several texts in one pass",
        "Eight texts in one pass over the weights make {least one_pass_over_one_by_one_*:.1f} to "
        "{most one_pass_over_one_by_one_*:.1f} times as many tokens per second as one after another.",
        "Greedy texts of the engine, weights larger than any cache. Both ways make the same tokens, which the script "
        "checks. A streamed model keeps a part of its weights and reads the others once a pass.",
    ),
    "lossless": Chapter(
        "Lossless coding",
        "A whole model takes {whole_model_over_entropy:.4g} times the entropy of its exponents, and weights "
        "{least *_over_zipnn:.3f} to {most *_over_zipnn:.3f} of ZipNN's bytes.",
        "Share of the weights' bytes that is left, headers of streams included, beside the entropy of exponents (sign "
        "and mantissa as they are, trailing zeros of mantissas for nothing) and beside ZipNN, both with one thread. "
        "float16 weights that were bfloat16 take less than that entropy: their mantissas' lower bits are mostly zero.",
    ),
    "footprint": Chapter(
        "Memory and time of planning and packing",
        "Packing peaks at {least peak_bytes_of_pack_*:MB} to {most peak_bytes_of_pack_*:MB}, for models of "
        "{least steps/million weights:.1f} to {most steps/million weights:,.0f} million weights.",
    ),
    "rate_distortion": Chapter(
        "Entropy-coded trellis quantisation",
        "64 states are within {gaussian_most_bits_over_bound_64_states:.2f} bit of the Gaussian bound, scales "
        "included, and at equal KL a model takes {least model_bytes_saved_at_equal_kl_*:.0%} to "
        "{most model_bytes_saved_at_equal_kl_*:.0%} fewer bytes than at fixed rates.",
        "Distances to the bound count every stored byte. Quoted rows are from public re-implementations. Speeds are of "
        "this machine's instruction sets; the peers decode indices alone, without a trellis and without scales. What "
        "quantised weights can be compressed to: [compressibility.md](../compressibility.md).",
    ),
    "nested": Chapter(
        "Several rates in one artifact",
        "Read at its highest rate, one artifact of three rates would take {least bytes_over_alone_*:.3f} to "
        "{most bytes_over_alone_*:.3f} times the bytes of one packed for that rate alone to lose the same; at equal "
        "bytes it loses {least kl_over_alone_*:.2f} to {most kl_over_alone_*:.2f} times as much at the worst of its "
        "rates.",
        "The more error feedback gains, the more its refinement costs: noise that is shaped for what products lose has "
        "more power, and what codes it next does not know its shape (design.md §4). An artifact for each rate is "
        "planned within the bytes that the one for all reads at it, headers and kept tensors included.",
    ),
    "memory_codec": Chapter(
        "A fixed rate near the bound",
        "The bitshift trellis is {gaussian_bits_over_bound_2:.3f}, {gaussian_bits_over_bound_3:.3f} and "
        "{gaussian_bits_over_bound_4:.3f} bits above the Gaussian bound at 2, 3 and 4 bits, and plans for memory have "
        "{least *_of_grids:.2f} to {most *_of_grids:.2f} of the KL that they have with grids alone. Whole models "
        "write {least *_writing_*_over_llama_cpp:.2f} to {most *_writing_*_over_llama_cpp:.2f} times as fast as "
        "llama.cpp's, and read {least *_reading_*_over_llama_cpp:.2f} to {most *_reading_*_over_llama_cpp:.2f} times.",
        "Bits over the bound count symbols and what a known start costs, not scales; all that is stored is beside "
        "them. Products are of random codes that lie in no cache, with the instruction set that the machine has; "
        "`speed_over_grid` compares a trellis with the grid of pairs of as many bits. ggml's products go through its "
        "own library, the faster of the layouts that it has; each is beside the rate that is nearest to its bits. "
        "Whole models have one codec throughout, head and embedding too, and are beside the fastest of llama.cpp's "
        "types of comparable bits that their widths allow: rows that 256 does not divide leave Q4_0, of 4.5 bits, "
        "also beside 3. KL at equal bytes is without error feedback.",
    ),
    "fuzz_streams": Chapter(
        "Damaged streams",
        "In {seconds_of_fuzzing:.0f} s, {cases_on_which_decoders_differ} damaged streams on which decoders differ, and "
        "{crashes_and_hangs} crashes or hangs.",
        "Every case goes through the reference and every native decoder.",
    ),
    "fuzz_artifacts": Chapter(
        "Artifacts that lie",
        "In {seconds_of_fuzzing:.0f} s, {findings} artifacts that a loader neither runs nor refuses.",
        "Every case is an artifact that is changed and sealed again, so that all digests are right, and goes through "
        "every loader, in a process that may neither die, hang nor swell. `transformers'` are errors of that "
        "library's own.",
    ),
    "kernels": Chapter(
        "Kernels",
        "Products read weights at {least gemv_*_share_of_dram_*:.0%} to {most gemv_*_share_of_dram_*:.0%} of DRAM's "
        "speed; whole models decode {least decode_over_llama_cpp_*:.1f} to {most decode_over_llama_cpp_*:.1f} times as "
        "fast as llama.cpp's nearest types.",
        "Sections measured one after the other; this virtual machine's DRAM reads at 25 to 56 GB/s from one minute to "
        "the next, which the spreads show. Whole models are run by the engine. Other libraries' 4-bit kernels reach "
        "the memory's speed too when it is the only load: between two that do, the ratio is that of their bits.",
    ),
}
