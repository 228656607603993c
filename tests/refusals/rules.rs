//! What gating refuses of a rule's own inputs: those that are missing, not asked for, or too short.

use moe_kernels::routers::gating::{Given, RuleInputs};
use moe_kernels::rules::{Appended, AppendedWeight, ChoiceBy};

use super::*;

#[test]
fn rule_inputs() {
    let d = open();
    let run = |gating: Gating, logits: usize, scales: [Option<usize>; 2]| {
        let logits = d.zeros::<f32>(logits);
        let (mut ids, mut weights) = (d.zeros::<i32>(T * (K + 1)), d.zeros::<f32>(T * (K + 1)));
        let [expert, global] = scales.map(|len| len.map(|len| d.zeros::<f32>(len)));
        let mut inputs = RuleInputs::new();
        inputs.expert_scale = expert.as_ref().map(|scale| scale.into());
        inputs.global_scale = global.as_ref().map(|scale| scale.into());
        let desc = GatingDesc::new(T, E, K, gating);
        let args = GatingArgs::new(&logits, &mut ids, &mut weights).rule(inputs);
        d.refused(|| gating::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let softmax = Gating::new(Score::Softmax);
    assert_eq!(run(softmax.expert_scale(true), T * E, [None, None]), "expert_scale");
    assert_eq!(run(softmax.expert_scale(true), T * E, [Some(E - 1), None]), "expert_scale");
    assert_eq!(run(softmax, T * E, [Some(E), None]), "expert_scale");
    assert_eq!(run(softmax.global_scale(true), T * E, [None, None]), "global_scale");
    assert_eq!(run(softmax.global_scale(true), T * E, [None, Some(0)]), "global_scale");
    assert_eq!(run(softmax, T * E, [None, Some(1)]), "global_scale");
    assert_eq!(run(softmax.choice(ChoiceBy::Given), T * E, [None, None]), "given");
    let column = Gating::new(Score::Sigmoid).appended(Some(Appended::new(1, AppendedWeight::Column)));
    assert_eq!(run(column, T * (E + 1) - 1, [None, None]), "logits");
    let fixed = softmax.appended(Some(Appended::new(2, AppendedWeight::Fixed(1.0))));
    assert_eq!(run(fixed, T * E, [None, None]), "ids");
}

#[test]
fn given_ids() {
    let d = open();
    let run = |gating: Gating, ids: usize, words: Option<(usize, usize)>| {
        let (logits, given) = (d.zeros::<f32>(T * E), d.zeros::<i64>(ids));
        let (mut chosen, mut weights) = (d.zeros::<i32>(T * K), d.zeros::<f32>(T * K));
        let of_tokens = d.zeros::<u32>(words.map_or(1, |(_, words)| words));
        let given = match words {
            None => Given::ids(&given),
            Some((vocabulary, _)) => Given::table(&given, vocabulary, &of_tokens),
        };
        let desc = GatingDesc::new(T, E, K, gating);
        let args = GatingArgs::new(&logits, &mut chosen, &mut weights).rule(RuleInputs::new().given(given));
        d.refused(|| gating::forward(&d.kernels, &d.stream, &desc, args)).1
    };
    let rule = Gating::new(Score::Sigmoid).choice(ChoiceBy::Given);
    assert_eq!(run(rule, T * K - 1, None), "given.ids");
    assert_eq!(run(rule, 7 * K - 1, Some((7, T))), "given.ids");
    assert_eq!(run(rule, 7 * K, Some((7, T - 1))), "given.words");
    assert_eq!(run(rule, 7 * K, Some((0, T))), "given.vocabulary");
    assert_eq!(run(Gating::new(Score::Sigmoid), T * K, None), "given");
}
