//! `azr plan`: what a model needs of a GPU, and what it could reach there; neither has to be at hand.

use std::path::Path;

use serde_json::{Value, json};

use crate::cli::args::PlanArgs;
use crate::cli::output::print;
use crate::compute::cuda::NUM_RUNNING;
use crate::compute::ops::MomentPrecision;
use crate::error::{Error, Result};
use crate::model::params::ParamTable;
use crate::model::plan::{
    Gpu, PAPER, Phase, StepShape, Workload, decode_s, forward_flops, kv_room, peak_bytes, segments, step_time,
    training_flops,
};
use crate::pipeline::config::Config;
use crate::weights::spec::{ModelSpec, qwen25};

/// Known GPUs: name, bytes of memory, bandwidth and bf16 operations per second that large copies and products reach.
const GPUS: [(&str, f64, f64, f64); 3] =
    [("h200", 141e9, 4.3e12, 790e12), ("h100", 80e9, 3.0e12, 700e12), ("a100", 80e9, 1.75e12, 270e12)];
/// Memory below this belongs to an H100, above to an H200.
const H200_FROM: f64 = 100e9;

/// Prints the plan.
///
/// # Errors
/// When there is no such model or GPU.
pub fn plan(args: &PlanArgs) -> Result<()> {
    let (spec, gpu) = (model(&args.weights)?, gpu(&args.gpu)?);
    let shape = StepShape { prompt: args.prompt, response: args.response, ..PAPER };
    // A sequence is half drawn on average; the pages hold whole prompts and what is reserved of the responses.
    let kv_tokens = args.batch * (args.prompt + args.response);
    let base = Workload {
        micro_batch_tokens: args.micro_batch_tokens,
        moments: MomentPrecision::F32,
        recompute: false,
        running: args.batch,
        kv_tokens,
        longest: args.prompt + args.response,
    };
    let choices = [
        base,
        Workload { recompute: true, ..base },
        Workload { moments: MomentPrecision::Bf16, ..base },
        Workload { moments: MomentPrecision::Bf16, recompute: true, ..base },
    ];
    // The first that fits: moments are kept exact as long as recomputing makes room. Else the smallest.
    let fits = |w: &&Workload| peak_bytes(&segments(&spec, w)) <= gpu.memory_bytes;
    let work = choices.iter().find(fits).unwrap_or(&choices[3]);
    let report = report(&spec, work, &shape, &gpu, args);
    if args.json {
        print(&format!("{report}\n"))?;
    } else {
        print(&table(&report))?;
    }
    Ok(())
}

/// What a run that did not fit would need, as lines of text.
pub fn of_run(spec: &ModelSpec, config: &Config, memory_bytes: usize) -> String {
    let running = if config.rollout.max_running > 0 { config.rollout.max_running } else { NUM_RUNNING };
    let longest = config.rollout.max_prompt + config.rollout.max_propose.max(config.rollout.max_solve);
    let longest = longest.min(spec.max_position_embeddings);
    let work = Workload {
        micro_batch_tokens: config.train.micro_batch_tokens,
        moments: config.train.moments,
        recompute: config.train.recompute,
        running,
        kv_tokens: if config.rollout.kv_tokens > 0 { config.rollout.kv_tokens } else { running * longest },
        longest,
    };
    let all = segments(spec, &work);
    let mut text = String::new();
    for s in &all {
        text += &format!("{:<34} {:<10} {:>9.2} GB\n", s.name, when(s.phase), s.bytes / 1e9);
    }
    let (peak, memory) = (peak_bytes(&all) / 1e9, memory_bytes as f64 / 1e9);
    text += &format!("most at once {peak:.2} GB, the GPU has {memory:.2} GB\n");
    text + "smaller: rollout.kv_tokens, rollout.max_running, train.micro_batch_tokens; train.recompute=true; train.moments=bf16\n"
}

fn when(phase: Phase) -> &'static str {
    match phase {
        Phase::Always => "always",
        Phase::Rollout => "rollout",
        Phase::Training => "training",
    }
}

/// A model by its size, config.json or folder.
///
/// # Errors
/// When there is none.
pub fn model(name: &str) -> Result<ModelSpec> {
    if let Some(spec) = qwen25(name) {
        return Ok(spec);
    }
    let path = Path::new(name);
    let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    if !path.exists() {
        return Err(Error::config(format!("there is no model {name}"))
            .with_hint("name a config.json, its folder, or 0.5B, 1.5B, 3B or 7B"));
    }
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
    let config: Value = serde_json::from_str(&text)
        .map_err(|e| Error::config(format!("{} is no JSON: {e}", path.display())).with_hint("name a config.json"))?;
    ModelSpec::from_config(&config)
}

/// A GPU by its name or memory.
fn gpu(name: &str) -> Result<Gpu> {
    let lower = name.to_lowercase();
    if let Some((_, memory_bytes, bandwidth, flops)) = GPUS.iter().find(|g| g.0 == lower) {
        return Ok(Gpu { memory_bytes: *memory_bytes, bandwidth: *bandwidth, flops: *flops });
    }
    let digits = lower.trim_end_matches("gb").trim();
    match digits.parse::<f64>() {
        Ok(gb) if (1.0..1e6).contains(&gb) => {
            let (_, _, bandwidth, flops) = if gb * 1e9 >= H200_FROM { GPUS[0] } else { GPUS[1] };
            Ok(Gpu { memory_bytes: gb * 1e9, bandwidth, flops })
        }
        _ => {
            Err(Error::usage(format!("there is no GPU {name}")).with_hint("name h200, h100, a100 or its memory: 141GB"))
        }
    }
}

fn report(spec: &ModelSpec, work: &Workload, shape: &StepShape, gpu: &Gpu, args: &PlanArgs) -> Value {
    let all = segments(spec, work);
    let (peak, time) = (peak_bytes(&all), step_time(spec, work, shape, gpu));
    let context = shape.prompt + shape.response / 2;
    let length = shape.prompt + shape.response;
    let again = if work.recompute { forward_flops(spec, length, 0.0) } else { 0.0 };
    let flops = training_flops(spec, length, shape.response as f64 / length as f64) + again;
    json!({
        "model": args.weights,
        "parameters": ParamTable::new(spec).num_params(),
        "gpu": args.gpu,
        "memory_gb": gpu.memory_bytes / 1e9,
        "segments": all.iter().map(|s| json!({"name": s.name, "when": when(s.phase), "gb": s.bytes / 1e9})).collect::<Vec<_>>(),
        "peak_gb": peak / 1e9,
        "fits": peak <= gpu.memory_bytes,
        "settings": {
            "train.moments": work.moments,
            "train.recompute": work.recompute,
            "train.micro_batch_tokens": work.micro_batch_tokens,
            "rollout.max_running": work.running,
            "rollout.kv_tokens": work.kv_tokens,
        },
        "kv_room_tokens": kv_room(spec, work, gpu),
        "roofline": {
            "decode_tokens_per_s": work.running as f64 / decode_s(spec, work.running, context, gpu),
            "training_tokens_per_s": gpu.flops / flops,
            "prefill_s": time.prefill_s,
            "decode_s": time.decode_s,
            "train_s": time.train_s,
            "step_s": time.total_s(),
            "steps_per_gpu_hour": 3600.0 / time.total_s(),
        },
    })
}

fn table(report: &Value) -> String {
    let mut out = String::new();
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    out += &format!(
        "{} ({:.2} billion parameters) on {}\n",
        text(&report["model"]),
        number(&report["parameters"]) / 1e9,
        text(&report["gpu"])
    );
    out += &format!("\n{:<34} {:<10} {:>9}\n", "memory", "when", "GB");
    for segment in report["segments"].as_array().into_iter().flatten() {
        out +=
            &format!("{:<34} {:<10} {:>9.2}\n", text(&segment["name"]), text(&segment["when"]), number(&segment["gb"]));
    }
    let always = report["segments"].as_array().into_iter().flatten().filter(|s| s["when"] == when(Phase::Always));
    let verdict = if report["fits"] == json!(true) {
        "fits"
    } else if always.map(|s| number(&s["gb"])).sum::<f64>() > number(&report["memory_gb"]) {
        "does NOT fit: weights, gradients and moments alone are too large; take a larger GPU or a smaller model"
    } else {
        "does NOT fit: take fewer micro-batch tokens or a smaller batch"
    };
    out += &format!(
        "{:<34} {:<10} {:>9.2} of {:.0}: {verdict}\n",
        "most at once",
        "",
        number(&report["peak_gb"]),
        number(&report["memory_gb"])
    );
    out += &format!("room for {} KV tokens\n", report["kv_room_tokens"]);
    out += "\nsettings\n";
    for (key, value) in report["settings"].as_object().into_iter().flatten() {
        out += &format!("--set {key}={}\n", text(value));
    }
    out += "\nby the roofline (what is reached of it, azr bench measures)\n";
    for (key, value) in report["roofline"].as_object().into_iter().flatten() {
        out += &format!("{key:<24} {:>12.1}\n", number(value));
    }
    out
}

/// A value without quotes.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_known_by_name_and_by_memory() {
        assert_eq!(gpu("H200").expect("known").memory_bytes, 141e9);
        assert_eq!(gpu("80GB").expect("memory").bandwidth, 3.0e12);
        assert_eq!(gpu("141").expect("memory").bandwidth, 4.3e12);
        assert!(gpu("gb").is_err() && gpu("0GB").is_err() && gpu("h300").is_err());
    }

    #[test]
    fn models_are_known_by_size_and_file() {
        assert_eq!(model("3B").expect("a size").num_layers, 36);
        assert!(model("/nowhere").expect_err("no file").hint().is_some());
    }
}
