//! The main loop in a disassembly: basic blocks, and the circles that they form.

use std::collections::{HashMap, HashSet};

/// Instructions of the main loop, and how many of them are tensor core products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loop {
    pub instructions: usize,
    pub products: usize,
}

/// The innermost loop that holds tensor core instructions; of several the one with most of them, and of those the shortest.
///
/// Loops within it that hold none are waits that go round again until somebody else has come: ptxas puts all their rounds but
/// the first behind the kernel's end, from where they lead back into the middle. They are no part of a round that need not wait.
pub fn main_loop(sass: &str) -> Option<Loop> {
    let graph = Graph::of(sass);
    let all: HashSet<usize> = (0..graph.blocks.len()).collect();
    let mut found = Vec::new();
    graph.innermost(&all, &HashSet::new(), &mut found);
    found.into_iter().max_by_key(|main| (main.products, std::cmp::Reverse(main.instructions)))
}

/// Blocks that are entered at their first instruction and left at their last.
#[derive(Default)]
struct Graph {
    blocks: Vec<Block>,
}

#[derive(Default)]
struct Block {
    size: Loop,
    next: Vec<usize>,
}

impl Graph {
    fn of(sass: &str) -> Graph {
        let mut graph = Graph::default();
        let mut labels: HashMap<&str, usize> = HashMap::new();
        // Targets of each block's last instruction, and whether it may also go on to the next block.
        let mut ends: Vec<(Vec<&str>, bool)> = Vec::new();
        let mut open = false;
        for line in sass.lines() {
            let line = line.trim();
            if let Some(label) = line.strip_suffix(':').filter(|label| label.starts_with(".L")) {
                open = false;
                labels.insert(label, graph.blocks.len());
                continue;
            }
            let Some((_, text)) = line.strip_prefix("/*").and_then(|rest| rest.split_once("*/")) else { continue };
            let text = text.trim();
            if text.trim_end_matches(';').trim().is_empty() || text.starts_with("/*") {
                continue;
            }
            if !open {
                graph.blocks.push(Block::default());
                ends.push((Vec::new(), true));
                open = true;
            }
            let (block, end) = (graph.blocks.last_mut().expect("one is open"), ends.last_mut().expect("as many"));
            block.size.instructions += 1;
            block.size.products += usize::from(is_product(text));
            if let Some(falls_through) = leaves(text) {
                *end = (targets(text), falls_through);
                open = false;
            }
        }
        let count = graph.blocks.len();
        for (index, (targets, falls_through)) in ends.iter().enumerate() {
            let next = targets.iter().filter_map(|target| labels.get(target).copied());
            let next = next.chain(falls_through.then_some(index + 1)).filter(|&block| block < count);
            graph.blocks[index].next = next.collect();
        }
        graph
    }

    fn size(&self, blocks: &HashSet<usize>) -> Loop {
        blocks.iter().map(|&block| self.blocks[block].size).fold(Loop::default(), |sum, size| Loop {
            instructions: sum.instructions + size.instructions,
            products: sum.products + size.products,
        })
    }

    /// The innermost loops with products among `blocks`, whose loops go through none of `heads`.
    ///
    /// A loop is a set of blocks of which each leads to each; its heads are those that something outside leads to. The loops inside
    /// it are what is left of it when nothing leads back to a head. This needs no loop to have a single head.
    fn innermost(&self, blocks: &HashSet<usize>, heads: &HashSet<usize>, found: &mut Vec<Loop>) {
        for circle in self.circles(blocks, heads) {
            if self.size(&circle).products == 0 {
                continue;
            }
            let own_heads: HashSet<usize> = heads.iter().copied().chain(self.heads(&circle)).collect();
            let before = found.len();
            self.innermost(&circle, &own_heads, found);
            if found.len() > before {
                continue;
            }
            // What leads round without the loops inside, none of which holds a product.
            let waits: HashSet<usize> = self.circles(&circle, &own_heads).into_iter().flatten().collect();
            let quick: HashSet<usize> = circle.difference(&waits).copied().collect();
            let whole = self.size(&circle);
            let round = self.circles(&quick, heads).into_iter().map(|round| self.size(&round));
            found.push(
                round
                    .filter(|round| round.products == whole.products)
                    .min_by_key(|round| round.instructions)
                    .unwrap_or(whole),
            );
        }
    }

    /// Blocks of `circle` that are reached from outside it.
    fn heads(&self, circle: &HashSet<usize>) -> Vec<usize> {
        let outside = (0..self.blocks.len()).filter(|block| !circle.contains(block));
        let entered: HashSet<usize> = outside.flat_map(|block| self.blocks[block].next.iter().copied()).collect();
        let heads: Vec<usize> = circle.iter().copied().filter(|block| entered.contains(block)).collect();
        // The kernel itself may begin in one.
        if heads.is_empty() { circle.iter().copied().min().into_iter().collect() } else { heads }
    }

    /// The largest sets among `blocks` in which each leads to each, going through none of `heads` as a target: Tarjan's components.
    fn circles(&self, blocks: &HashSet<usize>, heads: &HashSet<usize>) -> Vec<HashSet<usize>> {
        let next = |block: usize| {
            let inside = |next: &usize| blocks.contains(next) && !heads.contains(next);
            self.blocks[block].next.iter().copied().filter(inside).collect::<Vec<_>>()
        };
        let mut circles = Vec::new();
        let (mut number, mut low) = (HashMap::new(), HashMap::new());
        let (mut stack, mut on_stack): (Vec<usize>, HashSet<usize>) = Default::default();
        let mut sorted: Vec<usize> = blocks.iter().copied().collect();
        sorted.sort_unstable();
        for start in sorted {
            if number.contains_key(&start) {
                continue;
            }
            let mut path: Vec<(usize, Vec<usize>)> = vec![];
            let mut enter = Some(start);
            loop {
                if let Some(block) = enter.take() {
                    let count = number.len();
                    number.insert(block, count);
                    low.insert(block, count);
                    stack.push(block);
                    on_stack.insert(block);
                    path.push((block, next(block)));
                }
                let Some((block, rest)) = path.last_mut() else { break };
                let block = *block;
                match rest.pop() {
                    Some(other) if !number.contains_key(&other) => enter = Some(other),
                    Some(other) if on_stack.contains(&other) => {
                        let least = low[&block].min(number[&other]);
                        low.insert(block, least);
                    }
                    Some(_) => {}
                    None => {
                        path.pop();
                        if let Some(&(above, _)) = path.last() {
                            let least = low[&above].min(low[&block]);
                            low.insert(above, least);
                        }
                        if low[&block] == number[&block] {
                            let at = stack.iter().rposition(|&other| other == block).expect("it is on the stack");
                            let circle: HashSet<usize> = stack.drain(at..).collect();
                            circle.iter().for_each(|block| {
                                on_stack.remove(block);
                            });
                            if circle.len() > 1 || next(block).contains(&block) {
                                circles.push(circle);
                            }
                        }
                    }
                }
            }
        }
        circles
    }
}

/// For an instruction that ends a block: whether it may also go on behind itself.
fn leaves(text: &str) -> Option<bool> {
    let opcode = opcode(text);
    let name = opcode.split('.').next().unwrap_or_default();
    if !["BRA", "BRX", "JMP", "JMX", "RET", "EXIT", "KILL"].contains(&name) {
        return None;
    }
    // `@P0 BRA`, `BRA P1, ...` and the branches that some lanes take do both.
    let conditional = text.starts_with('@')
        || opcode.contains('.') && name == "BRA"
        || text.split_whitespace().nth(1).is_some_and(|word| word.ends_with(',') && !word.starts_with('`'));
    Some(conditional)
}

/// The labels that a branch names.
fn targets(text: &str) -> Vec<&str> {
    let ends = |c: char| !(c.is_alphanumeric() || c == '_' || c == '.' || c == '$');
    text.match_indices(".L").map(|(at, _)| text[at..].split(ends).next().unwrap_or_default()).collect()
}

/// Whether it is a product of a warp, or of a warpgroup.
fn is_product(instruction: &str) -> bool {
    ["HMMA", "HGMMA"].iter().any(|name| opcode(instruction).starts_with(name))
}

/// The opcode of an instruction, without its predicate.
fn opcode(instruction: &str) -> &str {
    instruction.split_whitespace().find(|word| !word.starts_with('@')).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_loop_is_taken() {
        let sass = "
        /*0000*/                   S2R R4, SR_TID.X ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
        /*0030*/              @!P1 HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   HMMA.16816.F32.BF16 R0, R4, R8, R0 ;
.L_x_2:
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/              @!P2 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;";
        assert_eq!(main_loop(sass), Some(Loop { instructions: 3, products: 2 }));
    }

    #[test]
    fn a_branch_forward_closes_no_loop() {
        let sass = ".L_x_0:\n /*0000*/ HMMA.1688.F32.TF32 R0, R4, R8, R0 ;\n /*0010*/ BRA `(.L_x_1) ;\n.L_x_1:\n";
        assert_eq!(main_loop(sass), None);
    }

    /// As ptxas lays out a main loop that waits for barriers, inside a loop over tiles.
    #[test]
    fn waits_behind_the_end_lead_back_into_the_loop() {
        let sass = "
.L_x_9:
        /*0000*/                   MOV R3, UR4 ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR16], R3 ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR16+0x8], R3 ;
        /*0050*/              @!P0 BRA `(.L_x_4) ;
.L_x_2:
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/              @!P0 BRA P1, `(.L_x_9) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR16], R3 ;
        /*00b0*/              @!P0 BRA `(.L_x_3) ;
        /*00c0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR16+0x8], R3 ;
        /*00e0*/              @!P0 BRA `(.L_x_4) ;
        /*00f0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*0100*/                   BRA `(.L_x_5);";
        assert_eq!(main_loop(sass), Some(Loop { instructions: 7, products: 2 }));
    }

    #[test]
    fn a_table_of_targets_and_a_condition_behind_the_opcode() {
        let table = "/*1f10*/ BRX R6 -0x1f20 (*\"BRANCH_TARGETS .L_x_173,.L_x_174\"*);";
        assert_eq!(targets(table), [".L_x_173", ".L_x_174"]);
        assert_eq!(leaves("BRX R6 -0x1f20"), Some(false));
        assert_eq!(leaves("BRA P1, `(.L_x_63)"), Some(true));
        assert_eq!(leaves("BRA `(.L_x_63)"), Some(false));
        assert_eq!(leaves("BRA.DIV UR4, `(.L_x_90)"), Some(true));
        assert_eq!(leaves("@P0 EXIT"), Some(true));
        assert_eq!(leaves("BSYNC B0"), None);
    }
}
